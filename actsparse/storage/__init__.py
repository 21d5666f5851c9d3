"""Files, downloads, and measurements kept on disk."""
