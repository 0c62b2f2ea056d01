"""Kernels of the 2:4 proximal operator: one algorithm, several machines.

Each block of four weights w, with magnitudes sorted z1 >= z2 >= z3 >= z4 >= 0, solves

    min_{x >= 0}  1/2 sum_i (x_i - z_i)^2 + lam * e3(x),      e3(x) = sum_{i<j<k} x_i x_j x_k

and gets signs and order back. The least of three candidates is the global minimiser: keep two
weights (x = (z1, z2, 0, 0), objective (z3^2 + z4^2) / 2), three, or four. The derivation below
reduces both others to one scalar equation, each with a starting point from which Newton's method
cannot miss. (A minimiser keeps the largest magnitudes: swapping two entries of x into the order
of z never raises the objective.)

Scale. The operator is homogeneous: prox_lam(s z) = s prox_{s lam}(z). Kernels divide a block by z1,
so that z1 = 1 and the only parameter is L = lam * z1. All quantities are then of order one in
float32, whatever the weights' scale. If L >= 3, only two weights can survive.

Three weights. Stationarity x_i = z_i - L x_j x_k, multiplied by x_i, reads x_i (z_i - x_i) = L x1 x2 x3,
the same number for every i. So t = x3 fixes the others: x_i = (z_i + sqrt(z_i^2 - 4 t (z3 - t))) / 2
for i = 1, 2 (the larger root: with the smaller one the Hessian is not positive definite). What is left is

    h(t) = L x1(t) x2(t) - (z3 - t) = 0      on 0 <= t <= z3.

With s = 2 t - z3 each x_i is (z_i + sqrt(z_i^2 - z3^2 + s^2)) / 2, positive, convex and even in s; hence
so is x1 x2, and h is convex with at most two roots: the larger is the local minimum, the smaller a saddle.
h(z3) > 0, so Newton from t = z3 descends monotonically to the larger root; where there is none, the slope
turns negative or t leaves [0, z3] and no three-weight minimum exists.

Four weights. Write e1 = sum x and D_i = 1 - L (e1 - 2 x_i), the diagonal part of the Hessian
I + L (e1 - x_i - x_j)_{i != j}. Stationarity x_i = z_i - L e2(the other three) is equivalent to
D_i^2 = c + 4 L z_i with one c for all i, and at a local minimum D_i + D_j > 0, so at most D4 is negative.
Put D4 = q and D_i = sqrt(q^2 + 4 L (z_i - z4)). Everything follows from q:

    x_i = x4 + (D_i - q) / (2 L),      r := L e1 = 2 - (q + D1 + D2 + D3) / 2,
    and the equation left is            r^2 = q^2 - k,      k = 1 - 2 L (z1 + z2 + z3 - z4).

* k <= 0 (strong shrinkage): G(q) = r(q) - sqrt(q^2 - k) is concave, G(1) <= 0 and G' < 0 there, so Newton from
  q = 1 moves monotonically to the largest root, which is the local minimum, or finds a slope >= 0: no minimum.
* k > 0 (mild shrinkage, every real training step): the same equation in y = (1 - q) / L = x1 + x2 + x3 - x4,
      R(y) = x4 - z4 + L e2(x1, x2, x3) = 0,  x_i = x4 + d_i,  d_i = 2 (z_i - z4) / (D_i + q),  x4 = (y - sum d_i) / 2,
  which does not cancel for small L. Newton from y = z1 + z2 + z3 - z4 needs at most four steps in float32.

Both claims about starting points are tested against a float64 search over all supports with many starts
(``tests/oracle.py``). The final weights are written as z_i - L (...), so a weight that is not shrunk keeps its bits,
and none grows or changes sign.

Source of the penalty: Liu et al., ProxSparse, ICML 2025, https://arxiv.org/abs/2502.00258; of the operator:
Kuebler et al., https://arxiv.org/abs/2501.18015 (solved there by alternating sweeps).
"""
