def sharpness_metrics():
    return []
