"""Adapters for pytest and scapy."""
