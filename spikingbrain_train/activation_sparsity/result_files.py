"""What spikingbrain-analyze-sparsity leaves in --output, by the names that others read it by."""

NUMBERS_FILE, PICTURE_FILE = "sparsity.json", "sparsity.png"
FITTED = "fitted_threshold"
"""Name in NUMBERS_FILE of what --fit-threshold has found: null without it."""
