#!/usr/bin/env bash
# Full fine-tuning of LLaVA-1.5-7B on several nodes, as llava15_7b_full.sh: 2,672 steps of 8 pairs where NODES x GPUS is 8. More GPUs make
# larger steps: lower --max_steps, --save_steps and perhaps raise --learning_rate.
# Hardware: GPUs with 80 GB (ZeRO-2). With less memory, at more communication: --deepspeed scripts/train/zero3.json, or FSDP2 by
# --deepspeed "" --fsdp --fsdp_config scripts/train/fsdp2.json --activation_checkpointing False (its own takes over). OUTPUT and the
# data are on a disk that all nodes share.
# Hours: not measured here; not run on several nodes of GPUs.
# Expected: as llava15_7b_full.sh. SIGTERM or SIGUSR1 to torchrun on every node: the run saves at the end of its step within 4 minutes.
# Usage, the same on every node, HOST being one of them and PORT free there (Slurm: scripts/train/slurm.sh):
# scripts/train/llava15_7b_full_nodes.sh NODES GPUS_PER_NODE HOST:PORT MODEL SCORED_DATA OUTPUT [more flags]
set -euo pipefail

nodes=$1 gpus=$2 rendezvous=$3 model=$4 data=$5 output=$6
shift 6
exec torchrun \
    --nnodes "$nodes" \
    --nproc_per_node "$gpus" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$rendezvous" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown_timeout 240 \
    train/dpo.py \
    --model_name_or_path "$model" \
    --data_path "$data" \
    --output_dir "$output" \
    --dtype bfloat16 \
    --tf32 True \
    --prompt_name llava_v1 \
    --image_aspect_ratio pad \
    --model_max_length 2048 \
    --freeze_vision_tower True \
    --dpo_beta 0.1 \
    --dpo_use_average False \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --max_steps 2672 \
    --learning_rate 5e-7 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.05 \
    --weight_decay 0.01 \
    --activation_checkpointing True \
    --deepspeed scripts/train/zero2.json \
    --dataloader_num_workers 4 \
    --save_strategy steps \
    --save_steps 167 \
    --save_total_limit 16 \
    --logging_steps 5 \
    --logging_first_step True \
    --report_to tensorboard \
    "$@"
