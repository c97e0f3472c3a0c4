# An OpenAI-compatible server for a checkpoint, on vLLM.
#   docker build -t pairquant .
#   docker run --gpus all -p 8000:8000 -v $PWD/MODEL-PARO:/model pairquant
# The engine's own image brings CUDA, PyTorch and vLLM; this adds the plugin.
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}
WORKDIR /opt/pairquant
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python3 -m pip install --no-cache-dir .
EXPOSE 8000
ENTRYPOINT ["pairquant", "serve", "/model", "--engine", "vllm", "--host", "0.0.0.0"]
