"""What connects linkrx with other programs: pytest, scapy."""
