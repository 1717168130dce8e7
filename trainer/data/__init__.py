"""From files to micro-batches: records, templates and masks, examples, one global order."""
