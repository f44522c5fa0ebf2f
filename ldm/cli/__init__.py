"""The commands; tools/*.py are doors to them."""
