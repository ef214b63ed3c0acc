"""Multiple-choice tasks through lm-eval's own definitions, from local files, asked of any language model."""
