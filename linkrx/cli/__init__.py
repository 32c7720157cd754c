"""The command `linkrx`."""
