"""Pure functions on tensors and arrays: no files, no Ray, no global random state, no config objects."""
