"""What is wrong with the data, found before a GPU is held."""
