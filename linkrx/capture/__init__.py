"""Writes capture files: pcapng and pcap."""
