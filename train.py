"""
Train any stage of PEGS.

    accelerate launch train.py --config configs/mini/joint.yaml
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train.py --config configs/vicuna-7b/joint_rag.yaml --output_dir outputs/joint
"""

import sys

from pegs.training.stages import main


if __name__ == "__main__":
    sys.exit(main())
