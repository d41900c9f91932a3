import torch
from .tiles import Lanes, compute_dtype, plan, spans
aten = torch.ops.aten
def backward(dout, dlse, q, k, v, r, content_bias, position_bias, out, lse, is_causal, scale, first_distance, needs_grad):
    inputs = (q, k, v, r, content_bias, position_bias)
    dtype = compute_dtype(q)
    dq, dk, dv, dr, du, dw = (torch.empty_like(x) if x is not None and n else None for x, n in zip(inputs, needs_grad))
    H, D = r.shape[0], r.shape[2]
    dr_acc = torch.zeros(r.shape, dtype=dtype, device=r.device)
    du_acc = torch.zeros(H, D, dtype=dtype, device=r.device); dw_acc = torch.zeros_like(du_acc)
    batches, heads, rows = plan(*q.shape[:3], k.shape[2])
    for hs in spans(q.shape[1], heads):
        for bs in spans(q.shape[0], batches):
            g = Lanes(q, k, v, r, content_bias, position_bias, bs, hs, rows, is_causal, scale, first_distance)
            do = g.lanes(dout).contiguous()
            dk_l = torch.zeros(g.k.shape, dtype=dtype, device=q.device); dv_l = torch.zeros_like(dk_l)
            ds_buf = torch.empty_like(g._scores)
            for span in spans(q.shape[2], rows):
                p = g.scores(span)
                t, n, raw, shifted, lo, hi, used, rb = g.tile(span)
                torch.softmax(p, -1, out=p)
                dot = do[:, span]
                a = dv_l[:, :n]; torch.baddbmm(a, p.mT, dot, out=a)
                ds = ds_buf[: p.numel()].view(p.shape)
                torch.bmm(dot, g.v[:, :n].mT, out=ds)
                aten._softmax_backward_data.out(ds, p, -1, dtype, grad_input=ds)
                if dlse is not None:
                    ds.addcmul_(p, dlse[bs, hs, span].flatten(0, 1)[..., None])
                a = dk_l[:, :n]; torch.baddbmm(a, ds.mT, g.q_lanes(g.q_content, span), out=a)
                dqc = torch.bmm(ds, g.k[:, :n])
                raw[..., :t-1] = 0
                if not is_causal: raw[..., n:] = 0
                shifted.copy_(ds.view(shifted.shape))
                a = dr_acc[hs, g.offset - span.stop + 1 + lo: g.offset - span.stop + 1 + hi]
                band = raw[..., lo:hi]
                torch.baddbmm(a, band.mT, g.q_rows(g.q_position, span), out=a)
                dqp = torch.bmm(band, rb)
                du_acc[hs] += dqc.view(g.hc, g.bc, t, -1).sum((1, 2))
                dw_acc[hs] += dqp.sum(1)
                dqp = dqp.view(g.hc, t, g.bc, -1).transpose(1, 2)
                dq[bs, hs, span] = dqc.view(dqp.shape).add_(dqp).mul_(scale).transpose(0, 1)
            dk[bs, hs] = dk_l.view(dk[bs, hs].shape); dv[bs, hs] = dv_l.view(dk[bs, hs].shape)
    if du is not None: du.copy_(du_acc.mul_(scale))
    if dw is not None: dw.copy_(dw_acc.mul_(scale))
    dr.copy_(dr_acc)
    return dq, dk, dv, dr, du, dw
