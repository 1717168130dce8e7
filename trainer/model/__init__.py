"""The model: its files, its weights, its tokenizer, and what is computed with it inside one forward."""
