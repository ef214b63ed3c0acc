"""From text to batches: tokenizers and documents -> preprocess -> indexed -> gpt_dataset -> loader."""
