"""The networks; they know torch only."""
