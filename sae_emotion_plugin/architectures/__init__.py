"""Training SAE classes that SAELens lacks; what they save is plain SAELens.

They train under SAELens's own trainer and runner (after `register_architectures`), and under the loop of this package,
which takes their sparse step without a dense `[token, d_sae]` and adds what that trainer has no seam for.
"""

from sae_emotion_plugin.architectures.openai_topk import OpenAITopKTrainingSAE as OpenAITopKTrainingSAE
from sae_emotion_plugin.architectures.openai_topk import OpenAITopKTrainingSAEConfig as OpenAITopKTrainingSAEConfig
from sae_emotion_plugin.architectures.registration import register_architectures as register_architectures
from sae_emotion_plugin.architectures.relu_l1 import ReluL1TrainingSAE as ReluL1TrainingSAE
from sae_emotion_plugin.architectures.relu_l1 import ReluL1TrainingSAEConfig as ReluL1TrainingSAEConfig
from sae_emotion_plugin.architectures.sparse_topk import SparseStepTopKTrainingSAE as SparseStepTopKTrainingSAE
