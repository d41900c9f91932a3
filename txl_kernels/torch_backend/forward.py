import torch
from .tiles import Lanes, compute_dtype, plan, spans

def forward(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance):
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    batches, heads, rows = plan(*q.shape[:3], k.shape[2])
    for bs in spans(q.shape[0], batches):
        for hs in spans(q.shape[1], heads):
            g = Lanes(q, k, v, r, content_bias, position_bias, bs, hs, rows, is_causal, scale, first_distance)
            for span in spans(q.shape[2], rows):
                p = g.scores(span)
                row_max = p.amax(-1)
                torch.softmax(p, -1, out=p)
                out[bs, hs, span].flatten(0,1).copy_(torch.bmm(p, g.v[:, : p.shape[2]]))
                lse[bs, hs, span].flatten(0,1).copy_(row_max - p.amax(-1).log_())
    return out, lse
