// The study report: all of its plots are dot plots.
plots.push(...[...document.querySelectorAll(".plot")].map(dotPlot));
