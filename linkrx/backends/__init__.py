"""One file per kernel mechanism. The folder listing is the registry: a file `name.py` holds the Backend of that name."""
