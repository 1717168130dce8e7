"""`make demo`: from a committed grammar to a tuned model, with nothing but the checkout."""
