"""Names of the files that the subcommands put into ``--output``."""

NEURONS_NUMBERS, NEURONS_MEANS, NEURONS_PICTURE = "neurons.json", "neurons.safetensors", "neurons.png"
ABILITIES_NUMBERS, ABILITIES_NEURONS = "abilities.json", "abilities.safetensors"
ABILITIES_PICTURE = "abilities.png"
MOEFY_NUMBERS, MOEFY_PICTURE = "moefy.json", "moefy.png"
PREDICTORS_NUMBERS, PREDICTORS_WEIGHTS = "predictors.json", "predictors.safetensors"
PREDICTORS_PICTURE = "predictors.png"
