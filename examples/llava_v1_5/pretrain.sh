#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5 as published (projector only, 558k captions, batch 256, learning rate 1e-3, cosine), with MIR.
# Run it in a checkout of haotian-liu/LLaVA in whose environment mir-callback is installed. Everything in capitals can be
# set from outside; arguments are passed on to the training script and override what stands here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

: "${LAUNCH:=deepspeed --module}"                          # or: torchrun --nproc_per_node 8 -m
: "${SCRIPT:=llava/train/train_mem.py}"
: "${LANGUAGE_MODEL:=lmsys/vicuna-7b-v1.5}"
: "${VISION_TOWER:=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/LLaVA-Pretrain}"
: "${ZERO:=$here/zero2.json}"
: "${OUTPUT:=checkpoints/llava-v1.5-7b-pretrain-mir}"
: "${MIR_PROBE:=}"                                         # a probe that 'mir probe --save' wrote, or these folders:
: "${MIR_IMAGES:=playground/data/eval/textvqa/train_images}"
: "${MIR_TEXTS:=playground/data/cnn/stories}"
: "${MIR_SAMPLES:=100}"
: "${MIR_EVERY:=50}"
: "${MIR_STOP:=none}"                                      # plateau: stop when MIR is level

if [ -n "$MIR_PROBE" ]; then
    probe=(--mir_probe "$MIR_PROBE")
else
    probe=(--mir_images "$MIR_IMAGES" --mir_texts "$MIR_TEXTS" --mir_num_samples "$MIR_SAMPLES")
fi

exec $LAUNCH mir_callback.launch \
    "${probe[@]}" --mir_every "$MIR_EVERY" --mir_stop "$MIR_STOP" \
    -- "$SCRIPT" \
    --deepspeed "$ZERO" \
    --model_name_or_path "$LANGUAGE_MODEL" \
    --version plain \
    --data_path "$DATA/blip_laion_cc_sbu_558k.json" \
    --image_folder "$DATA/images" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 24000 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to wandb \
    "$@"
