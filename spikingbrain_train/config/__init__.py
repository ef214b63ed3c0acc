"""What a run is: typed dataclasses, cross-field checks, errors that say what to change. Imports no torch."""
