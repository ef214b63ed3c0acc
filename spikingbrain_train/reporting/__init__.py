"""What a person or a dashboard sees of a run. Imports neither torch nor any room but config."""
