# syntax=docker/dockerfile:1
# A server in NVIDIA's PyTorch image, which has torch, TransformerEngine and FlashAttention built for its CUDA:
#
#   docker build --tag megatron-star .
#   docker run --gpus all --ipc host --publish 5000:5000 --volume /shared/llama-8b:/model:ro \
#       --volume /secrets/star-key:/key:ro --env CP=8 megatron-star --api-key-file /key
#
# No weights are in it. Variables and arguments are those of launch/serve.sh; docs/operations.md has more.
ARG PYTORCH_TAG=26.05-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG}

WORKDIR /opt/megatron-star
COPY . .
RUN scripts/install_in_container.sh && useradd --create-home --uid 10001 star

USER 10001
ENV PYTHON=python3 REPOSITORY=/opt/megatron-star CHECKPOINT=/model HOST=0.0.0.0 PORT=5000
EXPOSE 5000
# Loading may take long; from then on it is well as soon as it answers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["bash", "-c", "curl --fail --silent --output /dev/null http://127.0.0.1:$PORT/health"]
ENTRYPOINT ["/opt/megatron-star/launch/serve.sh"]
