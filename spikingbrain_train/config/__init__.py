"""What a run is: dataclasses with rules beside their fields, composed, checked and stored. Imports no torch."""
