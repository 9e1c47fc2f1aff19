"""How the scales and shifts of blocks are chosen: one file a method."""
