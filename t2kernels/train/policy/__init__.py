"""What a policy says of its tokens, and of the options of a row."""
