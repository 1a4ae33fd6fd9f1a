package server

import "net/http"

// Routes returns the routes over REST, each as "METHOD /path", so that tests can compare them with
// what is documented.
func (s *Server) Routes() []string {
	var routes []string
	for _, r := range s.routes(http.NotFoundHandler()) {
		routes = append(routes, r.method+" "+r.path)
	}
	return routes
}

// Handler returns what answers requests, of both protocols.
func (s *Server) Handler() http.Handler { return s.http.Handler }

// Requests returns how many requests are in flight.
func (s *Server) Requests() int { return int(s.requests.Load()) }

// Download returns w as a download of an artifact writes to it.
func Download(w http.ResponseWriter) http.ResponseWriter { return &download{ResponseWriter: w} }
