"""Ways out: GGUF for llama.cpp, an ollama folder, ONNX, the Hugging Face Hub."""
