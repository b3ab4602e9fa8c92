"""One module a workflow step: each reads files, calls the rooms above, and writes files."""
