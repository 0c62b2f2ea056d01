"""Kernels of the 2:4 proximal operator: one algorithm, written for several devices.

Each block of four weights w, with magnitudes sorted z1 >= z2 >= z3 >= z4 >= 0, solves

    min_{x >= 0}  f(x) = 1/2 sum_i (x_i - z_i)^2 + lam * e3(x),      e3(x) = sum_{i<j<k} x_i x_j x_k

and gets its signs and its order back. (The minimiser is sorted and lies in the box 0 <= x <= z: f never rises when two
entries of x are swapped into the order of z, or when x is clamped to the box.) Gentle shrinkage is convex, and
coordinate descent solves it. Strong shrinkage is not convex. There two scalar equations give the only candidates, and
Newton's method has a starting point for each from which it always converges.

Scale. The operator is homogeneous: prox_lam(s z) = s prox_{s lam}(z). Kernels divide a block by z1,
so that z1 = 1 and the only parameter is L = lam * z1. All quantities are then of order one in
float32, whatever the weights' scale. If L >= 3, only two weights can survive.

Gentle shrinkage, 2 L (z1 + z2 + z3 - z4) < 1. Every real training step is of this kind. With e1 = sum x the Hessian of
f is

    H = diag(1 - L (e1 - 2 x_i)) + (L / e1) (e1 1 - x)(e1 1 - x)^T - (L / e1) x x^T.

Its diagonal part is at least 1 - L (x1 + x2 + x3 - x4), and x x^T / e1 has norm at most x1. So H is positive definite
wherever L (2 x1 + x2 + x3 - x4) < 1, which in the box follows from L (2 z1 + z2 + z3) < 1; and that follows from the
condition, since 2 z4 <= z2 + z3. f is strictly convex on the box, so it has one minimiser, whether that keeps two,
three or four weights, and coordinate descent x_i <- max(0, z_i - L e2(the other three)) from x = z converges to it:
three sweeps at L = 0.05, about ten at the edge of the condition.

Strong shrinkage: the least of three candidates. Two weights are x = (z1, z2, 0, 0), with f = (z3^2 + z4^2) / 2.

Three weights. Stationarity x_i = z_i - L x_j x_k, multiplied by x_i, reads x_i (z_i - x_i) = L x1 x2 x3, the same
number for every i. So t = x3 determines the others: x_i = (z_i + sqrt(z_i^2 - 4 t (z3 - t))) / 2 for i = 1, 2 (the
larger root: with the smaller one the Hessian is not positive definite). What is left is

    h(t) = L x1(t) x2(t) - (z3 - t) = 0      on 0 <= t <= z3.

With s = 2 t - z3 each x_i is (z_i + sqrt(z_i^2 - z3^2 + s^2)) / 2, positive, convex and even in s; hence so is x1 x2,
and h is convex with at most two roots: the larger is the local minimum, the smaller a saddle. h(z3) > 0, so Newton from
t = z3 descends monotonically to the larger root; where there is none, the slope turns negative or t leaves [0, z3] and
no three-weight minimum exists.

Four weights. Write D_i = 1 - L (e1 - 2 x_i). Stationarity x_i = z_i - L e2(the other three) is equivalent to
D_i^2 = c + 4 L z_i with one c for all i, and at a local minimum D_i + D_j > 0, so at most D4 is negative. Put D4 = q
and D_i = sqrt(q^2 + 4 L (z_i - z4)). Everything follows from q:

    x_i = (D_i - a) / (2 L),   a = (q + D1 + D2 + D3) / 2 - 1,   r := L e1 = 1 - a,
    and the equation left is   r^2 = q^2 - k,                    k = 1 - 2 L (z1 + z2 + z3 - z4) <= 0.

G(q) = r(q) - sqrt(q^2 - k) is concave (r is, and the root is convex as k <= 0), G(1) <= 0 and G'(1) < 0. So Newton from
q = 1 moves monotonically to the largest root, which is the local minimum, or finds a slope >= 0: there is none.

Tests compare all of this with a float64 search over all supports with many starts (``tests/oracle.py``). The final
weights are written as z_i - L e2(...). So a weight that is not shrunk keeps its bits, and none grows or changes sign.

Source of the penalty: Liu et al., ProxSparse, ICML 2025, https://arxiv.org/abs/2502.00258; of the operator:
Kuebler et al., https://arxiv.org/abs/2501.18015 (solved there by alternating sweeps from zero, which are not always
global: see ``tests/test_prox_op.py``).
"""
