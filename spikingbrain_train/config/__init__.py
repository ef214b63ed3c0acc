"""What a run is: dataclasses with rules beside their fields, composed, checked, stored. Imports no torch."""
