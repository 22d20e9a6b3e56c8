"""Everything periodic: each callback watches training and changes nothing in it."""
