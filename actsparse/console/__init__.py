"""What the command line takes and shows: options, progress, tables, pictures."""
