#include <vector>
static void jacobi(int n, std::vector<double>& A, std::vector<double>& E) {
  E.assign(n * n, 0);
  for (int i = 0; i < n; i++) E[i * n + i] = 1;
  for (int sw = 0; sw < 12; sw++) {
    double off = 0;
    for (int i = 0; i < n; i++)
      for (int j = i + 1; j < n; j++) off += A[i * n + j] * A[i * n + j];
    double tr = 0;
    for (int i = 0; i < n; i++) tr += A[i * n + i];
    if (off < 1e-10 * tr * tr) break;
    for (int p = 0; p < n; p++)
      for (int q = p + 1; q < n; q++) {
        double x = A[p * n + q];
        if (fabs(x) < 1e-300) continue;
        double th = (A[q * n + q] - A[p * n + p]) / (2 * x), t = (th >= 0 ? 1 : -1) / (fabs(th) + sqrt(th * th + 1)),
               c = 1 / sqrt(t * t + 1), s = t * c;
        for (int k = 0; k < n; k++) {
          double a = A[k * n + p], b = A[k * n + q];
          A[k * n + p] = c * a - s * b;
          A[k * n + q] = s * a + c * b;
        }
        for (int k = 0; k < n; k++) {
          double a = A[p * n + k], b = A[q * n + k];
          A[p * n + k] = c * a - s * b;
          A[q * n + k] = s * a + c * b;
        }
        for (int k = 0; k < n; k++) {
          double a = E[k * n + p], b = E[k * n + q];
          E[k * n + p] = c * a - s * b;
          E[k * n + q] = s * a + c * b;
        }
      }
  }
}
// M = (S/mean + damp)^(-pow), normalised to trace n
static void invpow(int n, const V& S, V& M, double damp, double pw, bool normalise) {
  std::vector<double> A(n * n), E;
  double tr = 0;
  for (int i = 0; i < n; i++) tr += S[i * n + i];
  tr /= n;
  if (!(tr > 1e-30)) return;
  for (int i = 0; i < n * n; i++) A[i] = S[i] / tr;
  jacobi(n, A, E);
  std::vector<double> d(n);
  double sum = 0;
  for (int i = 0; i < n; i++) {
    d[i] = pow(std::max(A[i * n + i], 0.) + damp, -pw);
    sum += d[i];
  }
  double z = normalise ? 0 : 0;
  if (normalise) {
    double q = 0;
    for (int i = 0; i < n; i++) q += std::max(A[i * n + i], 0.) * d[i] * d[i];
    z = sqrt(n / q);
  } else
    z = pow(tr, -pw);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) {
      double v = 0;
      for (int k = 0; k < n; k++) v += E[i * n + k] * d[k] * E[j * n + k];
      M[i * n + j] = v * z;
    }
}
static Rule make_rule(const Hp& h) {
  Rule r;
  r.norm = h.str("norm", "running");
  r.rf = h("rf", .02);
  r.rb = h("rb", .02);
  r.thr = h("thr", 1.5);
  r.c = h("c", .0125);
  r.bound = h.str("bound", "measured");
  r.gain = h("gain", 1);
  r.glr = h("glr", 1);
  r.blr = h("blr", 1);
  r.slow = h("slow", .001);
  r.varfloor = h("varfloor", 0);
  r.gp = h("gp", 0);
  r.gw = h("gw", 0);
  r.wh = h("wh", 0);
  r.whr = h("whr", .01);
  r.whp = h("whp", 1);
  r.s0 = h("s0", 0);
  r.rho = h("rho", .02);
  r.last = h("last", 0);
  r.fl = h("fl", 1);
  r.g2 = h("g2", 0);
  r.c2 = h("c2", 0);
  r.hm = h("hm", 0);
  r.gate = h("gate", 0);
  r.pf = h("pf", 0);
  r.pb = h("pb", 0);
  r.gcap = h("gcap", 0);
  r.gpow = h("gpow", 0);
  r.kal = h("kal", 0);
  r.cw = h("cw", 0);
  r.kcos = h("kcos", 0);
  r.kfloor = h("kfloor", 0.00105);
  r.kback = h("kback", 0);
  r.kceil = h("kceil", 1);
  r.tau = h("tau", 0);
  return r;
}
static void normf(Norm& n, const float* a, float* y, int B, int P, const Rule& R, Mode m, int li) {
  int C = n.C, N = B * P;
  if (R.norm == "none") {
    memcpy(y, a, (size_t)N * C * 4);
    return;
  }
  if (R.norm == "group") {
    int G = 8, S = C / G;
    n.ivs.resize(B * 16);
    for (int b = 0; b < B; b++)
      for (int g = 0; g < G; g++) {
        float s = 0, q = 0;
        for (int p = 0; p < P; p++)
          for (int c = 0; c < S; c++) {
            s += a[(b * P + p) * C + g * S + c];
          }
        s /= P * S;
        for (int p = 0; p < P; p++)
          for (int c = 0; c < S; c++) {
            float d = a[(b * P + p) * C + g * S + c] - s;
            q += d * d;
          }
        float iv = 1 / sqrtf(q / (P * S) + EPS);
        n.ivs[b * 16 + g] = s;
        n.ivs[b * 16 + 8 + g] = iv;
        for (int p = 0; p < P; p++)
          for (int c = 0; c < S; c++) {
            int i = (b * P + p) * C + g * S + c;
            y[i] = (a[i] - s) * iv * n.g[g * S + c] + n.b[g * S + c];
          }
      }
    return;
  }
  float mean[64], var[64];
  if (m == TRAIN || m == MEASURE) {
    for (int c = 0; c < C; c++) mean[c] = var[c] = 0;
    for (int i = 0; i < N; i++)
      for (int c = 0; c < C; c++) mean[c] += a[i * C + c];
    for (int c = 0; c < C; c++) mean[c] /= N;
    for (int i = 0; i < N; i++)
      for (int c = 0; c < C; c++) {
        float d = a[i * C + c] - mean[c];
        var[c] += d * d;
      }
    for (int c = 0; c < C; c++) var[c] /= N;
    if (m == MEASURE) {
      for (int c = 0; c < C; c++) {
        n.mu[c] = mean[c];
        n.var[c] = var[c];
      }
    } else {
      n.t++;
      double rate = max(1 - pow(1 - R.rf, pow(P, R.pf)), 1 / n.t);
      if (R.kal > 0) {
        if (n.kprev.empty()) n.kprev.assign(C, 0);
        double num = 0, d2 = 0, p2 = 0;
        for (int c = 0; c < C; c++) {
          float u = (mean[c] - n.mu[c]) / sqrtf(n.var[c] + EPS);
          num += u * n.kprev[c];
          p2 += n.kprev[c] * n.kprev[c];
          d2 += R.kcos > 0 ? u * u : min(25.f, u * u);
          n.kprev[c] = u;
        }
        if (R.kcos > 0)
          n.kden = sqrt(d2 * p2);
        else
          n.kden += max(.02, 1 / n.t) * (d2 - n.kden);
        if (n.t > 2) n.kla += (R.kcos > 1 ? R.kal : max(R.kal, 1 / n.t)) * max(-1., min(1., num / max(n.kden, 1e-12)));
        n.kla = min(log(R.kceil), max(log(R.kfloor), n.kla));
        rate = max(exp(n.kla), 1 / n.t);
        n.ksum += rate;
      }
      double share = rate;
      if (R.norm == "running") {
        float q = 0;
        for (int c = 0; c < C; c++) {
          float d = mean[c] - n.mu[c];
          q += min(16.f, (var[c] + d * d) / (n.var[c] + EPS));
        }
        q /= C;
        if (q > R.thr) share = max(share, (q / R.thr - 1) / (q - 1));
        n.dshare += share;
        n.dq += q;
        if (n.t == 1) share = 1;
      }
      for (int c = 0; c < C; c++) {
        float d = mean[c] - n.mu[c];
        n.mu[c] += share * d;
        n.var[c] = (1 - share) * n.var[c] + share * var[c] + share * (1 - share) * d * d;
      }
      double sl = max(R.slow, 1 / n.t);
      for (int c = 0; c < C; c++) {
        float d = mean[c] - n.smu[c];
        n.smu[c] += sl * d;
        n.svar[c] = (1 - sl) * n.svar[c] + sl * var[c] + sl * (1 - sl) * d * d;
      }
    }
  }
  const float* mu = m == SLOW ? n.smu.data() : n.mu.data();
  const float* va = m == SLOW ? n.svar.data() : n.var.data();
  if (R.norm == "batch" && m == TRAIN) {
    mu = mean;
    va = var;
  }
  for (int c = 0; c < C; c++) {
    n.um[c] = mu[c];
    n.inv[c] = 1 / sqrtf(va[c] + EPS);
  }
  float sc[64], sh[64];
  for (int c = 0; c < C; c++) {
    sc[c] = n.inv[c] * n.g[c];
    sh[c] = n.b[c];
  }
  if (R.wh > 0) {
    if (n.M.empty()) {
      n.M.assign(C * C, 0);
      n.S.assign(C * C, 0);
      for (int c = 0; c < C; c++) n.M[c * C + c] = n.S[c * C + c] = 1;
    }
    if (m == TRAIN) {
      float r = max(R.whr, 1 / (n.t + 10));
      static thread_local V acc;
      acc.assign(C * C, 0);
      float xh[64];
      for (int i = 0; i < N; i++) {
        for (int c = 0; c < C; c++) xh[c] = max(-5.f, min(5.f, (a[i * C + c] - n.um[c]) * n.inv[c]));
        for (int c = 0; c < C; c++)
          for (int d = 0; d < C; d++) acc[c * C + d] += xh[c] * xh[d];
      }
      for (int i = 0; i < C * C; i++) n.S[i] += r * (acc[i] / N - n.S[i]);
      if ((long)n.t % 50 == 0 || (n.t < 200 && (long)n.t % 10 == 0)) invpow(C, n.S, n.M, R.wh, .5 * R.whp, true);
    }
    float xh[64], o[64];
    for (int i = 0; i < N; i++) {
      for (int c = 0; c < C; c++) {
        xh[c] = (a[i * C + c] - n.um[c]) * n.inv[c];
        o[c] = 0;
      }
      for (int d = 0; d < C; d++)
        for (int c = 0; c < C; c++) o[c] += n.M[d * C + c] * xh[d];
      for (int c = 0; c < C; c++) y[i * C + c] = o[c] * n.g[c] + sh[c];
    }
    return;
  }
  for (int i = 0; i < N; i++)
    for (int c = 0; c < C; c++) y[i * C + c] = (a[i * C + c] - n.um[c]) * sc[c] + sh[c];
}
static void normb(Norm& n, float* g, const float* a, float* da, int B, int P, const Rule& R, double lr, int li) {
  int C = n.C, N = B * P;
  if (R.norm == "none") {
    memcpy(da, g, (size_t)N * C * 4);
    return;
  }
  if (R.norm == "group") {
    int G = 8, S = C / G;
    fill(n.gg.begin(), n.gg.end(), 0);
    fill(n.gb.begin(), n.gb.end(), 0);
    for (int b = 0; b < B; b++)
      for (int k = 0; k < G; k++) {
        float s = n.ivs[b * 16 + k], iv = n.ivs[b * 16 + 8 + k], s1 = 0, s2 = 0;
        for (int p = 0; p < P; p++)
          for (int c = 0; c < S; c++) {
            int i = (b * P + p) * C + k * S + c, ch = k * S + c;
            float xh = (a[i] - s) * iv;
            n.gg[ch] += g[i] * xh;
            n.gb[ch] += g[i];
            s1 += g[i] * n.g[ch];
            s2 += g[i] * n.g[ch] * xh;
          }
        s1 /= P * S;
        s2 /= P * S;
        for (int p = 0; p < P; p++)
          for (int c = 0; c < S; c++) {
            int i = (b * P + p) * C + k * S + c, ch = k * S + c;
            float xh = (a[i] - s) * iv;
            da[i] = iv * (g[i] * n.g[ch] - s1 - xh * s2);
          }
      }
    return;
  }
  int exn = 0;
  if (R.bound == "measured" && R.norm == "running") {
    double s2 = 0;
    for (int c = 0; c < C; c++) s2 += n.g[c] * n.g[c] + n.b[c] * n.b[c];
    double size = sqrt(R.fl ? max(s2, (double)C) : s2);
    for (int b = 0; b < B; b++) {
      double q = 0;
      for (int i = b * P * C; i < (b + 1) * P * C; i++) q += g[i] * g[i];
      q = sqrt(q);
      double f = R.c * size / (lr * q + 1e-30);
      n.dex += f < 1;
      exn += f < 1;
      n.dn += q;
      if (f < 1)
        for (int i = b * P * C; i < (b + 1) * P * C; i++) g[i] *= f;
    }
  }
  float s1[64], s2[64], sg1[64], sg2[64];
  if (R.wh > 0) {  // gamma/beta grads in whitened space, then g -> grad wrt xhat / gamma
    for (int c = 0; c < C; c++) sg1[c] = sg2[c] = 0;
    float xh[64], o[64];
    for (int i = 0; i < N; i++) {
      for (int c = 0; c < C; c++) {
        xh[c] = (a[i * C + c] - n.um[c]) * n.inv[c];
        o[c] = 0;
      }
      for (int d = 0; d < C; d++)
        for (int c = 0; c < C; c++) o[c] += n.M[d * C + c] * xh[d];
      for (int c = 0; c < C; c++) {
        sg1[c] += g[i * C + c];
        sg2[c] += g[i * C + c] * o[c];
        xh[c] = g[i * C + c] * n.g[c];
        o[c] = 0;
      }
      for (int d = 0; d < C; d++)
        for (int c = 0; c < C; c++) o[c] += n.M[d * C + c] * xh[d];
      for (int c = 0; c < C; c++) g[i * C + c] = o[c];
    }
  }
  double G0 = R.glr * pow(P, -R.gpow);
  if (R.gcap > 0) G0 *= min(1., R.gcap / lr);
  for (int c = 0; c < C; c++) s1[c] = s2[c] = 0;
  for (int i = 0; i < N; i++)
    for (int c = 0; c < C; c++) {
      s1[c] += g[i * C + c];
      s2[c] += g[i * C + c] * (a[i * C + c] - n.um[c]) * n.inv[c];
    }
  {
    double q = 0, z = 0;
    for (int c = 0; c < C; c++) {
      q += s1[c] * s1[c] + s2[c] * s2[c];
      z += n.g[c] * n.g[c] + n.b[c] * n.b[c];
    }
    double r = lr * sqrt(q / max(z, (double)C));
    n.nr++;
    n.rbar += max(.01, 1 / n.nr) * (r - n.rbar);
    n.rmean += r;
    if (R.tau > 0) G0 *= min(1., R.tau / (n.rbar + 1e-30));
  }
  for (int c = 0; c < C; c++) {
    n.gb[c] = (R.wh > 0 ? sg1 : s1)[c] * G0;
    n.gg[c] = (R.wh > 0 ? sg2 : s2)[c] * G0;
  }
  if (R.c2 > 0) {
    double q0 = 0;
    for (int c = 0; c < C; c++) q0 += n.g[c] * n.g[c] + n.b[c] * n.b[c];
    for (int c = 0; c < C; c++) n.gg[c] = n.gb[c] = 0;
    for (int b = 0; b < B; b++) {
      float u[64], v[64];
      double q = 0;
      for (int c = 0; c < C; c++) u[c] = v[c] = 0;
      for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) {
          int i = (b * P + p) * C + c;
          u[c] += g[i];
          v[c] += g[i] * (a[i] - n.um[c]) * n.inv[c];
        }
      for (int c = 0; c < C; c++) q += u[c] * u[c] + v[c] * v[c];
      float f = min(1., R.c2 * sqrt(q0) / (lr * R.glr * sqrt(q) + 1e-30)) * R.glr;
      for (int c = 0; c < C; c++) {
        n.gb[c] += f * u[c];
        n.gg[c] += f * v[c];
      }
    }
  }
  if (R.g2 > 0) {
    double q = 0;
    for (int c = 0; c < C; c++) q += n.g[c] * n.g[c] + n.b[c] * n.b[c];
    float f = min(1., q / C);
    for (int c = 0; c < C; c++) {
      n.gg[c] *= f;
      n.gb[c] *= f;
    }
  }
  if (R.s0 > 0 && (!R.last || li == 4)) {
    double q = 0;
    if (!R.hm) {
      for (int c = 0; c < C; c++) q += n.g[c] * n.g[c] + n.b[c] * n.b[c];
      if (li < 4) q *= 64. / C;
    } else {
      double hh = 0;
      for (int b = 0; b < B; b++)
        for (int c = 0; c < C; c++) {
          float u = 0;
          for (int p = 0; p < P; p++) u += (a[(b * P + p) * C + c] - n.um[c]);
          u = u / P * n.inv[c] * n.g[c] + n.b[c];
          hh += u * u;
        }
      hh /= B;
      n.H += max(.02, 1 / (n.t + 1)) * (hh - n.H);
      q = n.H;
      if (R.hm == 2) q *= 64. / C;
    }
    double S = lr * q / B;
    if (S > R.s0) {
      double k = R.rho * (1 - R.s0 / S) / lr;
      if (R.gate > 0) k *= exn / (double)B;
      for (int c = 0; c < C; c++) {
        n.gg[c] += k * n.g[c];
        n.gb[c] += k * n.b[c];
      }
    }
  }
  double rate = R.norm == "batch" ? 1 : R.kback > 0 ? exp(n.kla) : max(1 - pow(1 - R.rb, pow(P, R.pb)), 1 / (++n.tb));
  float k1[64], k2[64], k0[64];
  if (R.cw > 0) {
    if (n.A0.empty()) {
      n.A0.assign(C, 0);
      n.B0 = n.pA = n.pB = n.A0;
    }
    if (n.tb > 1 || R.kback) {
      n.sden += max(.01, 1 / n.tb) * (g_s - n.sden);
      n.sden = max(n.sden, 1e-9);
      double f = g_s / n.sden;
      for (int c = 0; c < C; c++) {
        n.A0[c] += n.prate * (f * n.pA[c] - n.A0[c]);
        n.B0[c] += n.prate * (f * n.pB[c] - n.B0[c]);
      }
    }
    for (int c = 0; c < C; c++) {
      n.A[c] = n.A0[c];
      n.Bv[c] = n.B0[c];
      n.pA[c] = s1[c] / N;
      n.pB[c] = s2[c] / N;
    }
    n.prate = rate;
  }
  for (int c = 0; c < C; c++) {
    n.A[c] += rate * (s1[c] / N - n.A[c]);
    n.Bv[c] += rate * (s2[c] / N - n.Bv[c]);
    float q = n.inv[c] * (R.wh > 0 ? 1 : n.g[c]) * R.gain;
    k0[c] = q;
    k1[c] = q * n.A[c];
    k2[c] = q * n.Bv[c] * n.inv[c];
  }
  for (int i = 0; i < N; i++)
    for (int c = 0; c < C; c++) da[i * C + c] = k0[c] * g[i * C + c] - k1[c] - k2[c] * (a[i * C + c] - n.um[c]);
  if (R.gw > 0 || R.gp > 0) {  // whiten the gradient
    if (n.GM.empty()) {
      n.GM.assign(C * C, 0);
      n.GS.assign(C * C, 0);
      for (int c = 0; c < C; c++) n.GM[c * C + c] = 1;
      n.gt = 0;
      n.gq.assign(C, 0);
    }
    n.gt++;
    float r = max(.002, 1 / n.gt);
    if (R.gp > 0) {
      float f[64], z = 0;
      for (int c = 0; c < C; c++) {
        float q = 0;
        for (int i = 0; i < N; i++)
          if (a[i * C + c] > 0) q += da[i * C + c] * da[i * C + c];
        n.gq[c] += r * (q / N - n.gq[c]);
        z += n.gq[c];
      }
      z /= C;
      for (int c = 0; c < C; c++) f[c] = pow(n.gq[c] / z + .01f, -R.gp / 2);
      for (int i = 0; i < N; i++)
        for (int c = 0; c < C; c++) da[i * C + c] *= f[c];
    } else {
      static thread_local V acc;
      acc.assign(C * C, 0);
      for (int i = 0; i < N; i++) {
        float d[64];
        for (int c = 0; c < C; c++) d[c] = a[i * C + c] > 0 ? da[i * C + c] : 0;
        for (int c = 0; c < C; c++)
          for (int e = 0; e < C; e++) acc[c * C + e] += d[c] * d[e];
      }
      for (int i = 0; i < C * C; i++) n.GS[i] += r * (acc[i] / N - n.GS[i]);
      if ((long)n.gt % 50 == 0) invpow(C, n.GS, n.GM, .05, .5 * R.gw, true);
      for (int i = 0; i < N; i++) {
        float o[64];
        for (int c = 0; c < C; c++) o[c] = 0;
        for (int d = 0; d < C; d++)
          for (int c = 0; c < C; c++) o[c] += n.GM[d * C + c] * da[i * C + d];
        for (int c = 0; c < C; c++) da[i * C + c] = o[c];
      }
    }
  }
}
