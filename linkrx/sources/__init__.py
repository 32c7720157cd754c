"""Where packets come from: probing, options, opening and configuring."""
