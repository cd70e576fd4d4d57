"""Data sets: from the files users have to labelled samples in splits. One file each."""
