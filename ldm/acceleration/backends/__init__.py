"""The backends, one file each; all files of this folder are imported."""
