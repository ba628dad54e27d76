"""Making a dictionary public: Neuronpedia's bulk import and API, and the Hugging Face Hub."""
