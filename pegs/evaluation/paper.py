"""The paper's own figures: Tables 1 to 5, 9 and 10, under the names that metrics have here."""


def _table(names: str, rows: dict[str, str]) -> dict[str, dict[str, float]]:
    keys = names.split()
    return {
        model: {key: float(value) for key, value in zip(keys, values.split(), strict=True) if value != "-"}
        for model, values in rows.items()
    }


PAPER: dict[str, dict[str, dict[str, float]]] = {
    "text": _table(
        "bleu_1 bleu_2 bleu_3 bleu_4 dist_1 dist_2 dist_3 rouge_l meteor cider bertscore",
        {
            "Vicuna-text": "0.44 0.30 0.22 0.17 0.879 0.994 0.999 0.31 0.37 0.39 0.878",
            "Vicuna-tool": "0.43 0.29 0.22 0.17 0.870 0.989 0.994 0.30 0.36 0.38 0.900",
            "ChatGLM3-text": "0.42 0.28 0.21 0.16 0.806 0.981 0.996 0.31 0.40 0.40 0.886",
            "ChatGLM3-tool": "0.36 0.22 0.16 0.11 0.859 0.992 0.998 0.26 0.34 0.20 0.899",
            "PEGS-Ret": "0.46 0.32 0.25 0.20 0.839 0.989 0.997 0.34 0.42 0.47 0.906",
            "PEGS-RAG": "0.46 0.32 0.25 0.20 0.839 0.989 0.997 0.34 0.42 0.47 0.906",
            "PEGS-Gen": "0.47 0.33 0.26 0.21 0.848 0.990 0.997 0.35 0.44 0.57 0.911",
        },
    ),
    "mm": _table(
        "frequency mmr f_mmr",
        {
            "Vicuna-tool": "0.141 0.725 0.602",
            "ChatGLM3-tool": "0.905 0.659 0.647",
            "PEGS-Ret": "0.850 0.674 0.653",
            "PEGS-RAG": "0.847 0.680 0.659",
            "PEGS-Gen": "0.811 0.672 0.647",
        },
    ),
    "llm": _table(
        "emp_txt emp_mm con rank",
        {
            "Vicuna-text": "3.677 - 4.322 4.527",
            "Vicuna-tool": "3.822 3.799 4.247 4.093",
            "ChatGLM3-text": "3.691 - 4.341 5.037",
            "ChatGLM3-tool": "3.700 3.760 4.220 4.400",
            "PEGS-Ret": "3.873 4.040 4.380 4.030",
            "PEGS-RAG": "3.927 4.076 4.370 3.900",
            "PEGS-Gen": "3.768 4.353 4.404 1.917",
        },
    ),
    "human": _table(
        "StiGQ Et Es Con Flu Inf StiD",
        {
            "Vicuna-tool": "4.09 4.07 3.78 4.08 4.23 4.08 3.20",
            "ChatGLM3-tool": "4.32 4.06 3.24 4.11 4.58 3.99 3.10",
            "PEGS-Ret": "- 4.11 4.17 4.22 4.36 4.09 3.40",
            "PEGS-RAG": "3.37 4.12 2.92 4.22 4.36 4.10 3.80",
            "PEGS-Gen": "4.53 4.29 4.19 4.37 4.47 4.26 3.60",
        },
    ),
    "dataset": _table(
        "sessions unique_stickers turns vicuna_tokens gpt_tokens",
        {
            "train": "10785 4798 59424 10681108 9070221",
            "validation": "1000 880 5496 997569 845759",
            "test": "1146 1439 6128 659695 773473",
        },
    ),
    "icc": _table("StiGQ Et Es Con Flu Inf StiD", {"ICC": "0.920 0.540 0.928 0.457 0.728 0.608 0.365"}),
    "agreement": _table(
        "emp_txt emp_mm con rank id f_mmr",
        {"Spearman": "0.40 0.70 0.87 0.40 0.80 0.90", "Kendall": "0.40 0.60 0.74 0.40 0.60 0.80"},
    ),
}
