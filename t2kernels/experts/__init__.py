"""An expert as a file, and many experts as rows of tables."""
