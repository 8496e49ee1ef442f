"""Tasks whose problems are a dataset on the Hugging Face hub."""
