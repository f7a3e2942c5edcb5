"""PyTorch to ONNX without torch.export: a forward is written down at three sizes, then translated.

    record.py     what the forward calls, at one choice of sizes       module -> Recording
    sizes.py      what each number is in terms of the sizes            3 Recordings -> Merged
    translate.py  operators of PyTorch as operators of ONNX            Merged -> onnx_ir graph

It knows the operators that models of latent attention use, and raises `NotDirect` for everything
else; the caller then takes torch.export's long way.
"""
