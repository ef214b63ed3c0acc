"""Pictures of runs, drawn by matplotlib from their metrics; no display is asked for."""
