"""A recipe -> a trained dictionary: activations collected once, then one loop for every architecture.

The inputs are centred and divided by one number for training (or layer-normed, where the architecture says so); both
are folded into the saved weights, so that plain SAELens reads a dictionary that needs to know nothing of it.
"""

from sae_emotion_plugin.training.dictionaries import TrainedDictionary as TrainedDictionary
from sae_emotion_plugin.training.dictionaries import file_hashes as file_hashes
from sae_emotion_plugin.training.dictionaries import register_dictionary as register_dictionary
from sae_emotion_plugin.training.dictionaries import write_dictionary as write_dictionary
from sae_emotion_plugin.training.runs import SHUFFLED_MARK as SHUFFLED_MARK
from sae_emotion_plugin.training.runs import train as train
from sae_emotion_plugin.training.spaces import sae_metadata as sae_metadata
from sae_emotion_plugin.training.texts import recipe_documents as recipe_documents
