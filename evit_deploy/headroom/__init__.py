"""How far a model's values stay from the limits of FP16 and BF16, measured on real inputs in FP32."""
