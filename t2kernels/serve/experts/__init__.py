"""The served experts: their names and versions, their files, and how often they are loaded."""
