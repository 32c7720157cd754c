"""How frames and what is known of them lie in memory."""
