// The norms on raw pointers, see module.cpp: those that are operators too.
#pragma once

#include <cstdint>

namespace normlab {

using Pointer = uintptr_t;

void batch_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                   Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer running_mean,
                   Pointer running_var, Pointer num_batches, double slope, double momentum, double eps);
void batch_backward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                    Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                    double slope, double share);
void frozen_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                    Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer mean, Pointer var,
                    double slope, double eps);
double running_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                       Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer running_mean,
                       Pointer running_var, Pointer num_batches_tracked, Pointer share, Pointer innovation,
                       Pointer gradient_share, Pointer gradient_average, Pointer gradient_latest, double slope,
                       double momentum, double eps, bool recomputing);
void running_backward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                      Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                      Pointer gradient_average, Pointer gradient_latest, Pointer parameters_before,
                      Pointer parameters_gradient, Pointer log_learning_rate, Pointer learning_rate_steps,
                      Pointer output_square, Pointer step_length, Pointer latest_gradient_share, double slope,
                      double batch_rate, double step_bound, bool learns);
void group_forward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                      Pointer weight, Pointer bias, Pointer saved, double slope, int64_t groups, double eps);
void group_backward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                       Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                       double slope, int64_t groups);

}  // namespace normlab
