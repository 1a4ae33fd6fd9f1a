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
